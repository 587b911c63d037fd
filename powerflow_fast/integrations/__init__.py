"""Trainers of other libraries with the loss of this one; each module needs its library installed."""
