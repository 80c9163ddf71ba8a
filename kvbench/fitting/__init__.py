"""What is fitted once on a user's model, for policies that need it."""
