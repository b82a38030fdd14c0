"""The view of work in progress: its state, what is estimated from it, and how it is drawn."""
