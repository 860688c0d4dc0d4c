"""A run watched from outside: an endpoint on each rank, and the dashboard and alert rules for what it answers."""
