"""The shapes of requests and answers, a module for each noun.

They make the OpenAPI document, and every answer is checked against them.
"""
