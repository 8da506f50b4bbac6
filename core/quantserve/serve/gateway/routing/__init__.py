"""Which model a request is for; health, the list of models, the OpenAPI schema."""
