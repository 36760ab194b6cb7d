//! Pictures as views, and their way into the network.
