"""Answers before the GPUs are booked: which layouts there are, and what each costs."""
