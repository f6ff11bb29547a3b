"""Three throw-away hosts on a network of their own, what they run that no registry has as a file, and the test of a whole site on them."""
