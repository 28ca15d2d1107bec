"""The rules of certmount doctor that need no cluster."""
