"""Attention: which operator computes a case right, and the call to it.

``case`` holds what is asked and answered, ``table`` and ``route`` decide (none of them imports
torch), ``attend`` makes the call.
"""
