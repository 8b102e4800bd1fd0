"""AMCT's calling convention, on a module tree."""
