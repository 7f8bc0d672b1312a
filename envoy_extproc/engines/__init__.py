"""What engines say of themselves: the exposition parser, a dialect for each engine, and the scraper."""
