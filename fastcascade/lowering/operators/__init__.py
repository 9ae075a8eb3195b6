"""How each operator of torch translates; importing a module here registers its handlers."""
