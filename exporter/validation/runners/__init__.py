"""What runs the steps of a validation, behind one interface."""
