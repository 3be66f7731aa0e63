//! The harness that the suites share: a server on a free loopback port, a client that keeps to the wire, a storage that fails
//! on command, and an ear for logs and events.

pub mod client;
pub mod faults;
pub mod listen;
pub mod server;

pub use self::{
    client::{Answer, Call},
    faults::{Fault, FaultyStorage},
    listen::{Events, Logs},
    server::Server,
};
