//! What the examples share: where they listen, and where their log goes. See `examples/examples`.
#![forbid(unsafe_code)]

use std::{env, error::Error, fmt, io, process::ExitCode};

use tokio::net::TcpListener;
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

/// The port without a `PORT` in the environment.
const DEFAULT_PORT: u16 = 3000;

/// Listens on 127.0.0.1, on port 3000 or that of `PORT`; 0 takes a free one.
///
/// # Errors
///
/// If `PORT` is not a port, or it can't be had.
pub async fn listen() -> Result<TcpListener, ListenError> {
    let port = match env::var_os("PORT") {
        None => DEFAULT_PORT,
        Some(port) => match port.to_str().and_then(|port| port.parse().ok()) {
            Some(port) => port,
            None => return Err(ListenError::NotAPort(port.to_string_lossy().into_owned())),
        },
    };
    TcpListener::bind(("127.0.0.1", port))
        .await
        .map_err(|error| ListenError::Refused { port, error })
}

/// Sends the log to stderr: warnings and errors, or what `RUST_LOG` says. Stdout is for the lines to try.
pub fn log() {
    let filter = EnvFilter::builder()
        .with_default_directive(LevelFilter::WARN.into())
        .from_env_lossy();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .init();
}

/// The exit code of a program that ended so. An error goes to stderr, with its sources.
#[must_use]
pub fn exit(ended: Result<(), Box<dyn Error>>) -> ExitCode {
    let Err(error) = ended else {
        return ExitCode::SUCCESS;
    };
    eprintln!("error: {error}");
    let mut source = error.source();
    while let Some(error) = source {
        eprintln!("  because: {error}");
        source = error.source();
    }
    ExitCode::FAILURE
}

/// Why an example can't listen, and what helps.
#[derive(Debug)]
#[non_exhaustive]
pub enum ListenError {
    /// `PORT` is not a port.
    NotAPort(String),
    /// The system does not give us the port.
    Refused {
        /// Which one.
        port: u16,
        /// Why.
        error: io::Error,
    },
}

impl fmt::Display for ListenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAPort(port) => write!(
                f,
                "PORT is {port:?}, which is not a port: set it to a number up to 65535, or to 0 for any free port"
            ),
            Self::Refused { port, error } if error.kind() == io::ErrorKind::AddrInUse => write!(
                f,
                "port {port} is taken: stop the program that has it, or set PORT to another one (PORT=0 takes any free port)"
            ),
            Self::Refused { port, error } => write!(
                f,
                "can't listen on 127.0.0.1:{port}: {error}; set PORT to another port (PORT=0 takes any free one)"
            ),
        }
    }
}

impl Error for ListenError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::NotAPort(_) => None,
            Self::Refused { error, .. } => Some(error),
        }
    }
}
