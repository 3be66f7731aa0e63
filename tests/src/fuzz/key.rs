//! Header values.

use http::HeaderValue;
use idempotency_axum::{Key, KeyFormat};

/// A value that is a key is one key, however it is written, and no message shows one that is none.
///
/// # Panics
///
/// Panics if that is not so.
pub fn key(bytes: &[u8]) {
    let Ok(value) = HeaderValue::from_bytes(bytes) else {
        return;
    };
    let key = match Key::parse(&value) {
        Ok(key) => key,
        Err(error) => {
            let message = error.to_string();
            assert!(message.is_ascii() && message.len() < 300, "{message}");
            return;
        }
    };
    let text = key.as_str();
    assert!((1..=255).contains(&text.len()), "{text:?}");
    assert!(text.bytes().all(|byte| (b' '..=b'~').contains(&byte)));
    assert!(KeyFormat::any().check(&key).is_ok());
    assert_eq!(format!("{key:?}"), format!("Key({} bytes)", text.len()));

    // As the string that RFC 8941 makes of it.
    let escaped = text.replace('\\', "\\\\").replace('"', "\\\"");
    for written in [format!("\"{escaped}\""), format!("  \"{escaped}\"; a=1  ")] {
        let written = HeaderValue::from_str(&written).expect("visible ASCII");
        let read = Key::parse(&written).map(|key| key.as_str().to_owned());
        assert_eq!(read.as_deref(), Ok(text), "{written:?}");
    }
}
