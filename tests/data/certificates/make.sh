#!/bin/sh
# Makes the certificates and keys of this directory, with OpenSSL 3. They are for tests alone: everybody has the keys.
#
#   root.pem          trust this one, and it says yes to all of the others but self_signed.pem
#   intermediate.pem  what issued all of the others; it stands in each of the files after the certificate
#   ec.key, rsa.key   the keys: rsa.key belongs to rsa.pem, weak.key to weak.pem, self_signed.key to self_signed.pem,
#                     and ec.key to the others; encrypted.key and encrypted_old.key are ec.key with the password "secret"
set -eu
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -f ./*.pem ./*.key

cat > "$work/ca.cnf" <<END
[ca]
default_ca = default
[default]
new_certs_dir = $work
database = $work/index
default_md = sha256
policy = policy
rand_serial = yes
unique_subject = no
[policy]
organizationName = optional
commonName = optional
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid:always
[leaf]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid:always
END
: > "$work/index"

# sign ISSUER NAME KEY SUBJECT SECTION [EXTENSION...]: NAME.pem, valid from $from to $until. ISSUER "self" is itself.
from=20250101000000Z until=21250101000000Z
sign() {
    issuer=$1 name=$2 key=$3 subject=$4 section=$5
    shift 5
    { cat "$work/ca.cnf"; printf '[extensions]\n'; sed -n "/^\[$section\]/,/^\[/{/^\[/!p;}" "$work/ca.cnf"
      for extension; do printf '%s\n' "$extension"; done; } > "$work/this.cnf"
    openssl req -new -config /dev/null -key "$key" -subj "$subject" -out "$work/request.pem"
    if [ "$issuer" = self ]; then
        set -- -selfsign -keyfile "$key"
    else
        set -- -cert "$issuer.pem" -keyfile "$work/$issuer.key"
    fi
    openssl ca -batch -notext -config "$work/this.cnf" -extensions extensions -startdate $from -enddate $until \
        -in "$work/request.pem" -out "$name.pem" "$@" 2> "$work/log" || { cat "$work/log" >&2; exit 1; }
}

leaf() {
    name=$1
    sign intermediate "$@"
    cat intermediate.pem >> "$name.pem"
}

for key in "$work/root" "$work/intermediate" ec self_signed; do
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$key.key"
done
openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out rsa.key 2> /dev/null
openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:1024 -out weak.key 2> /dev/null
openssl pkcs8 -topk8 -in ec.key -out encrypted.key -passout pass:secret
openssl ec -in ec.key -out encrypted_old.key -aes256 -passout pass:secret 2> /dev/null

server="extendedKeyUsage = serverAuth"
sign self root "$work/root.key" "/O=Test/CN=Test Root" authority
sign root intermediate "$work/intermediate.key" "/O=Test/CN=Test Intermediate" authority

leaf site ec.key /CN=site.test leaf "$server" "subjectAltName = DNS:site.test, DNS:www.site.test"
leaf rsa rsa.key /CN=site.test leaf "$server" "subjectAltName = DNS:www.site.test, DNS:site.test"
leaf wildcard ec.key /CN=wild.test leaf "$server" "subjectAltName = DNS:*.wild.test, DNS:f*.odd.test"
leaf mixed ec.key / leaf "$server" "subjectAltName = critical, DNS:MIXED.Test, DNS:xn--bcher-kva.test"
leaf local ec.key /CN=local leaf "$server" "subjectAltName = DNS:localhost, IP:127.0.0.1, IP:::1"
leaf nameless ec.key /CN=nameless.test leaf "$server"
leaf client ec.key /CN=client.test leaf "extendedKeyUsage = clientAuth" "subjectAltName = DNS:client.test"
leaf weak weak.key /CN=weak.test leaf "$server" "subjectAltName = DNS:weak.test"
sign self self_signed self_signed.key /CN=self.test leaf "$server" "subjectAltName = DNS:self.test"
from=20230101000000Z until=20240101000000Z
leaf expired ec.key /CN=expired.test leaf "$server" "subjectAltName = DNS:expired.test"
from=21000101000000Z until=21010101000000Z
leaf future ec.key /CN=future.test leaf "$server" "subjectAltName = DNS:future.test"
