//! Passwords in locations, which must not be shown. Any text of a document in a message goes through [`Shown`].

use std::fmt;

/// The address of a server, perhaps with a password, which `Debug` does not show.
///
/// Its form depends on the class, so it is checked when it is opened.
#[derive(Clone, PartialEq)]
pub(super) struct Location(pub(super) String);

impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Shown(&self.0))
    }
}

/// Shows text from a document without a password: of a URL only the scheme, and the host if there is user information before it
/// (`redis://***@cache:6379`); nothing of other text that mentions a password.
///
/// Characters that are not printable are escaped, and long text is cut.
pub(super) struct Shown<'a>(pub(super) &'a str);

const LONGEST: usize = 60;

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(text) = *self;
        if !may_hold_a_secret(text) {
            let shown = text.chars().take(LONGEST).flat_map(char::escape_debug);
            let shown: String = shown.collect();
            let is_cut = text.chars().nth(LONGEST).is_some();
            return write!(f, "{shown}{}", if is_cut { "…" } else { "" });
        }
        if let Some((before, _)) = text.split_once("://")
            && is_scheme(before)
        {
            write!(f, "{before}://")?;
        }
        f.write_str("***")?;
        // A password may hold an `@` (and a `/`) too, so the host follows the last one.
        if let Some((_, host)) = text.rsplit_once('@')
            && !mentions_a_password(text)
        {
            let host = host.split(['/', '?', '#']).next().unwrap_or_default();
            if host.len() <= LONGEST && host.bytes().all(is_host_byte) {
                write!(f, "@{host}")?;
            }
        }
        Ok(())
    }
}

/// Whether text must not be shown, and not be split into pieces that would no longer be recognized.
pub(super) fn may_hold_a_secret(text: &str) -> bool {
    text.contains("://") || text.contains('@') || mentions_a_password(text)
}

/// Parameters of a connection, or a URL that is percent-encoded as a whole.
fn mentions_a_password(text: &str) -> bool {
    let text = text.to_ascii_lowercase();
    let has_one_of = |signs: &[&str]| signs.iter().any(|sign| text.contains(sign));
    (text.contains('=') && has_one_of(&["passw", "pwd", "secret", "token"]))
        || has_one_of(&["%3a", "%2f", "%40"])
}

fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.len() <= 20
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
}

fn is_host_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b".-_:[]".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_not_shown_whatever_it_is_made_of() {
        for password in [
            "pw", "p@w", "p/w", "p:w", "p?w#", "p%40w", "p\"w'", "p w\n", "", "p://w", "pé",
        ] {
            for user in ["", "shop"] {
                let text = format!("redis://{user}:{password}@cache:6379/0");
                let shown = Shown(&text).to_string();
                assert!(
                    shown == "redis://***@cache:6379" || shown == "redis://***",
                    "{shown}"
                );
            }
        }
    }

    #[test]
    fn what_is_less_than_a_url_is_not_shown_either() {
        for (text, shown) in [
            ("redis://:6379pw", "redis://***"),
            ("redis://shop:pw@", "redis://***@"),
            (":pw@cache:6379", "***@cache:6379"),
            ("x redis://:pw@cache", "***@cache"),
            ("host=db user=shop password=pw", "***"),
            ("postgres://db/shop?password=p@w", "postgres://***"),
            ("redis%3A%2F%2F%3Apw%40cache", "***"),
            ("a@b c", "***"),
        ] {
            assert_eq!(Shown(text).to_string(), shown);
        }
    }

    #[test]
    fn other_text_is_shown_as_it_is_but_not_at_any_length() {
        assert_eq!(Shown("30 sec\n").to_string(), "30 sec\\n");
        assert_eq!(Shown(&"é".repeat(61)).to_string(), "é".repeat(60) + "…");
    }
}
