"""The session that receives NOTIFYs, and the proofs that they arrive."""
