"""Tests of certmount."""
