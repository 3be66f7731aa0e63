//! Real PostgreSQL servers, each with files of its own, stopped when they are dropped; and PgBouncer before one.

mod bouncer;
mod server;

pub use self::{
    bouncer::Bouncer,
    server::{Mark, Postgres},
};
