//! The network before a server, which loses an answer, or falls silent.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UnixStream},
    sync::watch,
};

use super::Postgres;

/// Passes everything on, but for what it is told to lose.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    lost: Lost,
    silent: watch::Sender<bool>,
}

/// What is lost next.
type Lost = Arc<Mutex<Option<Loss>>>;

#[derive(Clone, Debug)]
struct Loss {
    /// What the question has in it.
    words: Vec<u8>,
    /// Whether the server gets the question.
    is_asked: bool,
    /// Who falls silent then.
    then: Option<watch::Sender<bool>>,
}

impl Proxy {
    /// One before this server, until the runtime ends.
    ///
    /// # Panics
    ///
    /// Panics if it can't listen.
    pub async fn before(postgres: &Postgres) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let socket = postgres.directory().join(".s.PGSQL.5432");
        let lost = Lost::default();
        let losing = lost.clone();
        let silent = watch::Sender::new(false);
        let hears = silent.subscribe();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(pass(client, socket.clone(), losing.clone(), hears.clone()));
            }
        });
        Self { port, lost, silent }
    }

    /// Where it listens.
    #[must_use]
    pub fn url(&self) -> String {
        let port = self.port;
        format!(
            "postgres://postgres@127.0.0.1:{port}/postgres?application_name=shop&sslmode=disable"
        )
    }

    /// Loses the answer to the next message with these bytes in it, and closes its connection. The server has done what it asked.
    pub fn lose_the_answer_to(&self, words: &[u8]) {
        *lock(&self.lost) = Some(Loss {
            words: words.to_owned(),
            is_asked: true,
            then: None,
        });
    }

    /// Loses the next message with these bytes in it, and closes its connection. The server does not get it.
    pub fn lose(&self, words: &[u8]) {
        *lock(&self.lost) = Some(Loss {
            words: words.to_owned(),
            is_asked: false,
            then: None,
        });
    }

    /// Falls silent once what is to be lost is lost.
    pub fn fall_silent_after_loss(&self) {
        if let Some(loss) = &mut *lock(&self.lost) {
            loss.then = Some(self.silent.clone());
        }
    }

    /// From now on nothing arrives, on either side, and no connection is closed.
    pub fn fall_silent(&self) {
        self.silent.send_replace(true);
    }

    /// Passes on what was held back, and everything else again.
    pub fn speak(&self) {
        self.silent.send_replace(false);
    }

    /// Whether nothing is to be lost any more.
    #[must_use]
    pub fn has_lost(&self) -> bool {
        lock(&self.lost).is_none()
    }
}

async fn pass(
    mut client: TcpStream,
    socket: PathBuf,
    lost: Lost,
    mut silent: watch::Receiver<bool>,
) {
    // An error is the end of the test.
    let mut speaks = async || silent.wait_for(|silent| !silent).await.is_ok();
    if !speaks().await {
        return;
    }
    let Ok(mut server) = UnixStream::connect(socket).await else {
        return;
    };
    let (mut buffer, mut answer) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        let passed = tokio::select! {
            read = client.read(&mut buffer) => match read {
                Ok(length) if length > 0 && speaks().await => {
                    let loss = loss(&lost, &buffer[..length]);
                    if loss.as_ref().is_some_and(|loss| !loss.is_asked) {
                        return;
                    }
                    if server.write_all(&buffer[..length]).await.is_err() {
                        return;
                    }
                    if loss.is_some() {
                        // Until the server says that it is done.
                        let _ = server.read(&mut answer).await;
                        if let Some(silent) = loss.and_then(|loss| loss.then) {
                            silent.send_replace(true);
                        }
                        return;
                    }
                    Ok(())
                }
                _ => return,
            },
            read = server.read(&mut answer) => match read {
                Ok(length) if length > 0 && speaks().await => {
                    client.write_all(&answer[..length]).await
                }
                _ => return,
            },
        };
        if passed.is_err() {
            return;
        }
    }
}

/// Takes what is to be lost, if this message has its words in it.
fn loss(lost: &Lost, message: &[u8]) -> Option<Loss> {
    lock(lost).take_if(|loss| {
        let mut parts = message.windows(loss.words.len());
        parts.any(|part| part == loss.words)
    })
}

fn lock(lost: &Lost) -> std::sync::MutexGuard<'_, Option<Loss>> {
    lost.lock().unwrap_or_else(PoisonError::into_inner)
}
