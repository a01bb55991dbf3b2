"""The demonstration: digits, with and without dropout, trained, inspected and compared."""
