"""What the user wants, as data: number formats, plans, rules, matches."""
