"""The engine: carries a policy inside an unchanged transformers model."""
