//! A driver that fails at each call in turn: errors, and nothing kept.
