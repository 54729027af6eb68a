"""Linearized models in servers: what a request needs is one page of fixed size, whatever its length."""
