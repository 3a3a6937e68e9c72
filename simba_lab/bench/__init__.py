"""Timings of our model beside other implementations, each in a process of its own."""
