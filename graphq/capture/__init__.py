"""Any model as a flat FX graph."""
