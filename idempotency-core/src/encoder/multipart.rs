//! Multipart bodies (RFC 2046 section 5.1) without their boundary: every attempt of a client has another one.
//!
//! What lies between the delimiters is hashed, each piece behind its length. The boundary is not replaced by some text of ours,
//! since a part could hold that text.
//!
//! ```text
//! preamble                                 piece 1, usually empty
//! --boundary CRLF
//! headers CRLF CRLF content CRLF           piece 2: a part
//! --boundary CRLF
//! headers CRLF CRLF content CRLF           piece 3: a part
//! --boundary--
//! CRLF epilogue                            the last piece, usually a CRLF
//! ```
//!
//! With the boundary the pieces give back the body, but for spaces and tabs that end a delimiter line. So two bodies have the
//! same pieces only if one is the other with another boundary, whatever text is in their parts.

use std::borrow::Cow;

use http::{HeaderMap, header};
use memchr::memmem;

use crate::key::FieldHasher;

const PIECES: &str = "idempotency/encoder/multipart/1";

/// The hash of the pieces of `body`, or `None` if it is not multipart: its `Content-Type` is another one, is malformed or names
/// not exactly one boundary, or `body` has no line that closes it.
pub(super) fn digest(headers: &HeaderMap, body: &[u8]) -> Option<[u8; 32]> {
    let boundary = boundary(headers)?;
    let mut pieces = FieldHasher::new(PIECES);
    let (mut piece, mut start) = (0, 0);
    let mut in_headers = false;
    let mut may_delimit = true;
    for end in memmem::find_iter(body, b"\r\n").chain([body.len()]) {
        let line = &body[start..end];
        match Line::read(line, &boundary) {
            Line::Close if may_delimit => {
                let last = pieces.field(&body[piece..start]).field(&body[end..]);
                return Some(last.finish());
            }
            Line::Delimiter if may_delimit => {
                pieces = pieces.field(&body[piece..start]);
                piece = end + 2;
                in_headers = true;
            }
            _ => {
                // The CRLF that ends the headers can't begin a delimiter too: one in the content needs a CRLF of its own. So a
                // field may have a boundary as its value, as it may for the parsers of forms.
                may_delimit = !(in_headers && line.is_empty());
                in_headers = in_headers && may_delimit;
            }
        }
        start = end + 2;
    }
    None
}

/// What a line of a body is, without the CRLF that ends it.
enum Line {
    Delimiter,
    Close,
    Text,
}

impl Line {
    fn read(line: &[u8], boundary: &[u8]) -> Self {
        let after_dashes = line.strip_prefix(b"--");
        let Some(rest) = after_dashes.and_then(|line| line.strip_prefix(boundary)) else {
            return Self::Text;
        };
        let (padding, kind) = match rest.strip_prefix(b"--") {
            Some(padding) => (padding, Self::Close),
            None => (rest, Self::Delimiter),
        };
        let is_padded = padding.iter().all(|byte| matches!(byte, b' ' | b'\t'));
        if is_padded { kind } else { Self::Text }
    }
}

/// The boundary of a multipart request. `None` where two readers may see two boundaries: the header or the parameter is repeated.
fn boundary(headers: &HeaderMap) -> Option<Cow<'_, [u8]>> {
    let mut types = headers.get_all(header::CONTENT_TYPE).iter();
    let (content_type, None) = (types.next()?.as_bytes(), types.next()) else {
        return None;
    };
    let end = content_type.iter().position(|byte| *byte == b';')?;
    let (media_type, mut parameters) = content_type.split_at(end);
    let (kind, subtype) = media_type.split_at_checked(b"multipart/".len())?;
    if !kind.eq_ignore_ascii_case(b"multipart/") || subtype.trim_ascii().is_empty() {
        return None;
    }
    let mut boundary = None;
    while !parameters.is_empty() {
        let parameter = parameters.strip_prefix(b";")?.trim_ascii_start();
        // RFC 9110 section 5.6.6 allows a semicolon with nothing behind it.
        if parameter.is_empty() || parameter.starts_with(b";") {
            parameters = parameter;
            continue;
        }
        let equals = parameter.iter().position(|byte| *byte == b'=')?;
        let (value, rest) = parameter_value(&parameter[equals + 1..])?;
        let is_boundary = parameter[..equals].eq_ignore_ascii_case(b"boundary");
        if is_boundary && boundary.replace(value).is_some() {
            return None;
        }
        parameters = rest.trim_ascii_start();
    }
    boundary.filter(|boundary| !boundary.is_empty())
}

/// The value of a parameter, and what follows it. It need not be a token: clients send `boundary=a/b` without the quotes that
/// it should have.
fn parameter_value(text: &[u8]) -> Option<(Cow<'_, [u8]>, &[u8])> {
    let Some(quoted) = text.strip_prefix(b"\"") else {
        let is_end = |byte: &u8| matches!(byte, b';' | b' ' | b'\t');
        let end = text.iter().position(is_end).unwrap_or(text.len());
        let (value, rest) = text.split_at(end);
        return (!value.contains(&b'"')).then_some((Cow::Borrowed(value), rest));
    };
    let mut value = Vec::new();
    let mut bytes = quoted.iter();
    loop {
        match *bytes.next()? {
            b'"' => return Some((Cow::Owned(value), bytes.as_slice())),
            b'\\' => value.push(*bytes.next()?),
            byte => value.push(byte),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn headers(boundary: &str) -> HeaderMap {
        let value = format!("multipart/form-data; boundary=\"{boundary}\"");
        HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::try_from(value).unwrap())])
    }

    fn digest_of(boundary: &str, body: &str) -> Option<[u8; 32]> {
        digest(&headers(boundary), body.as_bytes())
    }

    #[test]
    fn the_grammar_of_a_body() {
        for body in [
            "--b\r\n\r\nx\r\n--b--",
            "--b\r\n\r\nx\r\n--b--\r\n",
            "--b \t\r\n\r\nx\r\n--b-- \t\r\nepilogue",
            "preamble\r\n--b\r\n\r\nx\r\n--b--",
            "\r\n--b\r\n\r\nx\r\n--b--",
            // A form without fields, a field without a value, and one whose value is a boundary.
            "--b--\r\n",
            "--b\r\n\r\n\r\n--b--\r\n",
            "--b\r\n\r\n--b--\r\n--b--\r\n",
            "--b\r\nA: a\r\n--b--",
        ] {
            assert!(digest_of("b", body).is_some(), "{body:?}");
        }
        for body in [
            "",
            "--b",
            "--b\r\n",
            "--b\r\n\r\nx\r\n--b\r\n",
            "--b\r\n\r\nx--b--",
            "--b\r\n\r\n--b--",
            "--b\n\nx\n--b--\n",
            "--b\r\n\r\nx\r\n--b--x",
            "--b\r\n\r\nx\r\n --b--",
            "--B\r\n\r\nx\r\n--B--",
        ] {
            assert_eq!(digest_of("b", body), None, "{body:?}");
        }
    }

    #[test]
    fn only_boundary_and_padding_are_left_out() {
        let body = "--b\r\n\r\nx\r\n--b--\r\n";
        let same = digest_of("b", body);
        assert_eq!(digest_of("c", &body.replace('b', "c")), same);
        assert_eq!(digest_of("b", "--b\t\r\n\r\nx\r\n--b-- \r\n"), same);
        for other in [
            "--b\r\n\r\ny\r\n--b--\r\n",
            "--b\r\n\r\nx\r\n--b--",
            "--b\r\n\r\nx\r\n--b--\r\n\r\n",
            "\r\n--b\r\n\r\nx\r\n--b--\r\n",
            "--b\r\n\r\nx\r\n--b\r\n--b--\r\n",
            "--b\r\n\r\nx\r\n--b\r\n\r\n--b--\r\n",
            "--b\r\n\r\n\r\n--b\r\n\r\nx\r\n--b--\r\n",
            "--b\r\nA: a\r\n\r\nx\r\n--b--\r\n",
            "x\r\n--b--\r\n",
        ] {
            assert_ne!(digest_of("b", other), same, "{other:?}");
        }
    }

    #[test]
    fn the_boundary_of_a_content_type() {
        let read = |value: &str| {
            let value = HeaderValue::try_from(value).unwrap();
            let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, value)]);
            boundary(&headers).map(|found| String::from_utf8(found.into_owned()).unwrap())
        };
        for (value, found) in [
            ("multipart/form-data; boundary=b", "b"),
            ("MULTIPART/mixed ;\tBoundary=b;", "b"),
            ("multipart/mixed;;boundary=b; a=b", "b"),
            ("multipart/mixed; a=\"boundary=c\\\";\"; boundary=b", "b"),
            ("multipart/mixed; boundary=\"a \\\"b\\\\\"", "a \"b\\"),
            ("multipart/mixed; boundary=a/b=c", "a/b=c"),
        ] {
            assert_eq!(read(value).as_deref(), Some(found), "{value}");
        }
        for value in [
            "multipart/form-data",
            "multipart/; boundary=b",
            "multipart; boundary=b",
            "text/plain; boundary=b",
            "multipart/mixed; boundary=",
            "multipart/mixed; boundary=\"\"",
            "multipart/mixed; boundary=\"b",
            "multipart/mixed; boundary=\"b\\",
            "multipart/mixed; boundary=\"b\"c",
            "multipart/mixed; boundary=b c",
            "multipart/mixed; boundary=b\"c\"",
            "multipart/mixed; boundary =b",
            "multipart/mixed; boundary",
            "multipart/mixed; boundary=b; boundary=b",
            "multipart/mixed; boundary=b; BOUNDARY=c",
        ] {
            assert_eq!(read(value), None, "{value}");
        }
        let mut twice = headers("b");
        twice.append(header::CONTENT_TYPE, twice[header::CONTENT_TYPE].clone());
        assert_eq!(boundary(&twice), None);
    }

    /// Parts whose text is made of delimiters, of what looks like them, and of line ends.
    fn parts() -> impl Strategy<Value = Vec<String>> {
        let text = prop::sample::select(vec!["--a", "--b", "--", "a", "\r\n", "\n", " ", "x"]);
        let part = prop::collection::vec(text, 0..8).prop_map(|texts| texts.concat());
        prop::collection::vec(part, 0..4)
    }

    fn body(boundary: &str, parts: &[String]) -> String {
        let mut body = String::new();
        for part in parts {
            body += &format!("--{boundary}\r\n\r\n{part}\r\n");
        }
        body + &format!("--{boundary}--")
    }

    /// Whether a line of a part delimits parts (its first can't), so that `boundary` is not one that a client may pick.
    fn occurs(boundary: &str, parts: &[String]) -> bool {
        let is_text =
            |line: &str| matches!(Line::read(line.as_bytes(), boundary.as_bytes()), Line::Text);
        !parts
            .iter()
            .all(|part| part.split("\r\n").skip(1).all(is_text))
    }

    proptest! {
        #[test]
        fn equal_parts_and_only_they_give_equal_digests(one in parts(), other in parts()) {
            prop_assume!(!occurs("a", &one) && !occurs("b", &one) && !occurs("b", &other));
            let digest = digest_of("a", &body("a", &one));
            prop_assert!(digest.is_some());
            prop_assert_eq!(digest, digest_of("b", &body("b", &one)));
            prop_assert_eq!(digest == digest_of("b", &body("b", &other)), one == other);
        }

        #[test]
        fn no_body_panics(body in "[-b\r\n \t]{0,12}") {
            let pieces = digest_of("b", &body);
            prop_assert!(pieces.is_none() || body.contains("--b--"));
        }
    }
}
