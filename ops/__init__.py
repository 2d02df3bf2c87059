"""What `./serve` and `./check` are made of. Runs from a checkout, on the standard library alone; not in the package."""
