//! How file descriptors, guest RAM first among them, change process.
#![forbid(unsafe_code)]
