use hello_mtls::{newest, Failure};
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use std::io::{Read, Write};
use std::{env, net::TcpStream, sync::Arc, thread, time::Duration};

/// Sends a request on a new connection, and returns the body of the response.
fn get(host: &str) -> Result<String, Failure> {
    let files = newest()?;
    let config = ClientConfig::builder()
        .with_root_certificates(files.roots)
        .with_client_auth_cert(files.certificates, files.key)?;
    let connection = ClientConnection::new(Arc::new(config), host.to_owned().try_into()?)?;
    let mut tls = StreamOwned::new(connection, TcpStream::connect((host, 8443))?);
    tls.write_all(format!("GET / HTTP/1.0\r\nHost: {host}\r\n\r\n").as_bytes())?;
    let mut response = String::new();
    tls.read_to_string(&mut response)?;
    Ok(response.split_once("\r\n\r\n").ok_or("no response")?.1.to_owned())
}

fn main() -> Result<(), Failure> {
    let host = env::args().nth(1).ok_or("run: client HOST")?;
    loop {
        match get(&host) {
            Ok(body) => print!("{body}"),
            Err(error) => println!("error: {error}"),
        }
        thread::sleep(Duration::from_secs(1));
    }
}
