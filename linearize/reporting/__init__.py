"""Results for people: the page, its charts and verdict, tables on the terminal, plots."""
