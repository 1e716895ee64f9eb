"""What the tests share: helpers by purpose, none of them a test module.

A test module imports from here, and never from another test module.
"""
