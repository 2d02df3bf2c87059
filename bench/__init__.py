"""Measures streamchat beside other servers for the same job: `bench/run`. No part of the product."""
