"""The HTTP application: routes on the service's verbs and questions, and who may ask for what."""
