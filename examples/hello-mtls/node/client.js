const fs = require("node:fs");
const https = require("node:https");

// Read the files for each connection. One file contains the key and its certificate, so they always match.
const newest = () => {
  const pem = fs.readFileSync("/var/run/tls/site.pem");
  return { cert: pem, key: pem, ca: fs.readFileSync("/var/run/tls/root.crt") };
};

const get = () => {
  const request = https.get(process.argv[2], { ...newest(), agent: false }, (response) => {
    response.setEncoding("utf8").on("data", (text) => process.stdout.write(text));
  });
  request.on("error", (error) => console.log("error:", error.message));
};

setInterval(get, 1000);
