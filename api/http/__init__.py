"""The HTTP application: routes on the service's verbs and questions, and the permission that each needs."""
