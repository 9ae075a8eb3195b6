"""What a cascade is: stages, the selector, built-in networks, costs, and how all of it is saved."""
