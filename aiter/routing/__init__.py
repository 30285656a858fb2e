"""Which launches route a call, and what do they write to?"""
