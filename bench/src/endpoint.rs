//! Owns where requests go: the server's URL, completed and taken apart.

use hyper::http::Uri;

use crate::{Error, Result};

/// What a request body must look like at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndpointKind {
    /// `messages` in, `choices[].message` or `choices[].delta` out.
    Chat,
    /// `prompt` in, `choices[].text` out.
    Completions,
}

/// A server address that requests can be sent to.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Host without brackets.
    pub host: String,
    pub port: u16,
    pub tls: bool,
    /// Value of the `Host` header.
    pub authority: String,
    pub path: String,
    pub kind: EndpointKind,
}

/// How a URL that lacks its endpoint is completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completion {
    /// Append the endpoint for chat messages.
    Chat,
    /// Append the endpoint for raw and token prompts.
    Completions,
    /// Use the path as given; a bare host gets this one.
    Path(&'static str),
}

impl Endpoint {
    /// Takes `--url` apart. A missing scheme means http; a missing path (or one ending in `/v1`) is completed.
    pub fn parse(url: &str, completion: Completion) -> Result<Self> {
        let bad = |message: String| Error::flag("--url", format!("{url:?} {message}"));
        let with_scheme = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let uri: Uri = with_scheme.parse().map_err(|error| bad(format!("is not a URL: {error}")))?;
        let tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            other => {
                return Err(bad(format!("has scheme {:?}; use http or https", other.unwrap_or_default())));
            }
        };
        let authority = uri.authority().ok_or_else(|| bad("has no host".into()))?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if host.is_empty() {
            return Err(bad("has no host".into()));
        }
        let after_host = authority.as_str().rsplit_once(authority.host()).map_or("", |(_, after)| after);
        let port = match authority.port_u16() {
            Some(port) => port,
            None if after_host.is_empty() && tls => 443,
            None if after_host.is_empty() => 80,
            None => {
                return Err(bad(format!("has the port {after_host:?}, which is not one of 1 to 65535")));
            }
        };
        let path = complete_path(uri.path(), completion);
        let kind = if path.ends_with("/completions") && !path.ends_with("/chat/completions") {
            EndpointKind::Completions
        } else {
            EndpointKind::Chat
        };
        let path = match uri.query() {
            Some(query) => format!("{path}?{query}"),
            None => path,
        };
        let authority = authority.as_str().rsplit('@').next().unwrap_or_default().to_owned();
        Ok(Self { host, port, tls, authority, path, kind })
    }

    /// The completed URL.
    pub fn url(&self) -> String {
        format!("{}://{}{}", if self.tls { "https" } else { "http" }, self.authority, self.path)
    }
}

fn complete_path(path: &str, completion: Completion) -> String {
    let path = path.trim_end_matches('/');
    let tail = match completion {
        Completion::Path(default) => {
            return if path.is_empty() { default.into() } else { path.into() };
        }
        _ if path.ends_with("/completions") => return path.into(),
        Completion::Chat => "/chat/completions",
        Completion::Completions => "/completions",
    };
    match path {
        "" => format!("/v1{tail}"),
        _ if path.ends_with("/chat") => format!("{path}/completions"),
        _ => format!("{path}{tail}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_completed_like_evalscope_does() {
        let check = |url: &str, completion, expected: &str, kind| {
            let endpoint = Endpoint::parse(url, completion).unwrap();
            assert_eq!(endpoint.url(), expected);
            assert_eq!(endpoint.kind, kind, "{url}");
        };
        use EndpointKind as Kind;
        check("localhost", Completion::Chat, "http://localhost/v1/chat/completions", Kind::Chat);
        check("http://h:8000/", Completion::Chat, "http://h:8000/v1/chat/completions", Kind::Chat);
        check("http://h:8000/v1", Completion::Chat, "http://h:8000/v1/chat/completions", Kind::Chat);
        check("h:1", Completion::Completions, "http://h:1/v1/completions", Kind::Completions);
        check("http://h/v1/completions", Completion::Chat, "http://h/v1/completions", Kind::Completions);
        check("http://[::1]:8/v1/chat/completions", Completion::Chat, "http://[::1]:8/v1/chat/completions", Kind::Chat);
        check("http://h/generate", Completion::Path("/"), "http://h/generate", Kind::Chat);
        check("http://h", Completion::Path("/ask"), "http://h/ask", Kind::Chat);
        assert_eq!(Endpoint::parse("https://h", Completion::Chat).unwrap().port, 443);
        assert_eq!(Endpoint::parse("http://[::1]:8", Completion::Chat).unwrap().host, "::1");
    }

    #[test]
    fn bad_urls_name_the_flag() {
        for url in ["ftp://h/", "http://", "http://h:99999/"] {
            let message = Endpoint::parse(url, Completion::Chat).unwrap_err().to_string();
            assert!(message.starts_with("--url: "), "{message}");
        }
    }
}
