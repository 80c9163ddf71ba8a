"""Request traces replayed over a store of prefixes: what saved contexts and saved indexes are worth to a server."""
