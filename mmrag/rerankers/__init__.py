"""Models that judge a query and a document together."""
