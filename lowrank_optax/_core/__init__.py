"""What the public modules are made of; none of it is public."""
