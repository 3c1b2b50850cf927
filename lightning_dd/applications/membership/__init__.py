"""Membership-inference attacks on networks trained on distilled sets."""
