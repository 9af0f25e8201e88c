"""`python -m service.specs.numbers` prints the dictionary of numbers as a page."""

from service.specs.numbers import markdown

print(markdown())
