"""From a source to a converted folder and back; whether it can be converted, and what it costs."""
