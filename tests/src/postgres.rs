//! Real PostgreSQL servers, each with files of its own, stopped when they are dropped; PgBouncer before one; and a network that loses answers.

mod bouncer;
mod proxy;
mod server;

pub use self::{
    bouncer::Bouncer,
    proxy::Proxy,
    server::{Mark, Postgres},
};
