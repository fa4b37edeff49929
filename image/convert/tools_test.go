package convert

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/thaw-project/thaw/image/layer/torture"
	"github.com/thaw-project/thaw/kind"
)

// The tests in this file use other people's programs.

func need(t testing.TB, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Skipf("needs %s: apt-get install %[1]s", program)
	}
	return path
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return string(out)
}

// distribution is a docker-registry process.
type distribution struct {
	base, host string
	client     *http.Client
	log        *bytes.Buffer
	ca         string
}

// bcrypted is bcrypt of secret.
const bcrypted = "$2b$05$abcdefghijklmnopqrstuuKZZwGPFQToQFMewbv7uPTWVtT0jOTa."

func newDistribution(t testing.TB, secure bool) *distribution {
	t.Helper()
	program := need(t, "docker-registry")
	dir := t.TempDir()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	d := &distribution{host: l.Addr().String(), client: http.DefaultClient, log: &bytes.Buffer{}}
	l.Close()
	d.base = "http://" + d.host
	config := fmt.Sprintf("version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: %s\nhttp:\n  addr: %s\n", filepath.Join(dir, "data"), d.host)
	if secure {
		d.base = "https://" + d.host
		var pool *x509.CertPool
		d.ca, pool = certificate(t, dir)
		password := filepath.Join(dir, "htpasswd")
		must(t, os.WriteFile(password, []byte("me:"+bcrypted+"\n"), 0o600))
		config += fmt.Sprintf("  tls:\n    certificate: %s/cert.pem\n    key: %[1]s/key.pem\nauth:\n  htpasswd:\n    realm: test\n    path: %s\n", dir, password)
		d.client = &http.Client{Transport: authenticate{&http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}}
	}
	file := filepath.Join(dir, "config.yml")
	must(t, os.WriteFile(file, []byte(config), 0o600))
	cmd := exec.Command(program, "serve", file)
	cmd.Stdout, cmd.Stderr = d.log, d.log
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if resp, err := d.client.Get(d.base + "/v2/"); err == nil {
			resp.Body.Close()
			return d
		}
		if time.Now().After(end) {
			t.Fatalf("docker-registry does not answer: %s", d.log)
		}
	}
}

type authenticate struct{ http.RoundTripper }

func (a authenticate) RoundTrip(r *http.Request) (*http.Response, error) {
	r.SetBasicAuth("me", secret)
	return a.RoundTripper.RoundTrip(r)
}

func certificate(t testing.TB, dir string) (string, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	must(t, err)
	keyDER, err := x509.MarshalECPrivateKey(key)
	must(t, err)
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	must(t, os.WriteFile(filepath.Join(dir, "cert.pem"), cert, 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "key.pem"), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER}), 0o600))
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(cert)
	return filepath.Join(dir, "cert.pem"), pool
}

// TestDistribution converts within docker-registry 2.8: blobs are mounted from the
// source's repository, and an ordinary client pulls the result.
func TestDistribution(t *testing.T) {
	d := newDistribution(t, false)
	s := newServer(t)
	p := small(1, 3)
	source := pushTo(t, d.client, d.base, p, "library/source", "1")
	o := options(s, source, d.host+"/team/dest:thaw")
	r := convert(t, o)
	if r.PushedBytes != 0 {
		t.Errorf("%d bytes were pushed, blobs of one registry are mounted", r.PushedBytes)
	}
	raw, header, err := fetch(d.client, d.base, "team/dest", "thaw", false)
	must(t, err)
	if digest.FromBytes(raw).String() != r.Digest || header.Get("Content-Type") != p.root.MediaType {
		t.Errorf("destination holds %s, a %s", digest.FromBytes(raw), header.Get("Content-Type"))
	}
	skopeo := need(t, "skopeo")
	out := t.TempDir()
	run(t, skopeo, "--insecure-policy", "copy", "--src-tls-verify=false", "docker://"+o.Dest, "oci:"+out+":pulled")
	for d, raw := range p.blobs {
		if _, ok := p.manifests[d]; ok {
			continue
		}
		got, err := os.ReadFile(filepath.Join(out, "blobs/sha256", d.Encoded()))
		if err != nil || !bytes.Equal(got, raw) {
			t.Errorf("skopeo pulled blob %s differently: %v", d, err)
		}
	}
}

// TestDistributionSecure: TLS with a CA of one's own, and a password.
func TestDistributionSecure(t *testing.T) {
	d := newDistribution(t, true)
	s := newServer(t)
	source := pushTo(t, d.client, d.base, small(1, 2), "source", "1")
	login := t.TempDir()
	must(t, os.WriteFile(filepath.Join(login, "config.json"), []byte(fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, d.host, base64.StdEncoding.EncodeToString([]byte("me:"+secret)))), 0o600))
	o := options(s, source, d.host+"/dest:thaw")
	o.DockerConfigDir, o.CAFile = login, d.ca
	convert(t, o)

	o.Dest = d.host + "/dest:other"
	noCA := o
	noCA.CAFile = ""
	fails2(t, s, noCA, kind.Denied, "certificate")
	nobody := o
	nobody.DockerConfigDir = t.TempDir()
	fails2(t, s, nobody, kind.Denied, "credentials")
	// The source may be readable and the destination not: that is found out early.
	nobody.Source = "oci:" + small(2, 1).layout(t, "x")
	before := len(s.names())
	fails2(t, s, nobody, kind.Denied, "push to")
	if len(s.names()) != before {
		t.Error("blocks were written before finding out that the destination is denied")
	}
	bad := o
	bad.CAFile = filepath.Join(login, "config.json")
	fails2(t, s, bad, kind.Invalid, "no PEM")
}

func fails2(t *testing.T, s *server, o Options, want kind.Kind, word string) {
	t.Helper()
	_, err := Convert(t.Context(), o)
	if kind.Of(err) != want || !strings.Contains(err.Error(), word) || strings.Contains(err.Error(), secret) {
		t.Errorf("error %v of kind %q, want kind %q and the word %q", err, kind.Of(err), want, word)
	}
	s.unfinished()
}

// TestSkopeoSources converts what skopeo makes of an image: an OCI layout, archives,
// and docker save's format, whose layers are not compressed.
func TestSkopeoSources(t *testing.T) {
	skopeo := need(t, "skopeo")
	p := small(1, 3)
	dir := "oci:" + p.layout(t, "v1") + ":v1"
	tmp := t.TempDir()
	copyTo := func(to string) string {
		run(t, skopeo, "--insecure-policy", "copy", dir, to)
		return to
	}
	copyTo("oci:" + tmp + "/layout:a")
	copyTo("oci:" + tmp + "/layout:b")
	copyTo("oci-archive:" + tmp + "/oci.tar:c")
	copyTo("docker-archive:" + tmp + "/docker.tar:example.com/team/app:d")
	run(t, "gzip", "-k", tmp+"/docker.tar")
	var want []string
	for _, source := range []string{
		"oci:" + tmp + "/layout:b",
		"oci-archive:" + tmp + "/oci.tar",
		"docker-archive:" + tmp + "/docker.tar",
		"docker-archive:" + tmp + "/docker.tar:example.com/team/app:d",
		"docker-archive:" + tmp + "/docker.tar.gz",
	} {
		t.Run(strings.ReplaceAll(source[:strings.Index(source, ":")+1]+filepath.Base(source), "/", "_"), func(t *testing.T) {
			s := newServer(t)
			o := options(s, source, "oci:"+t.TempDir()+"/out:x")
			r := convert(t, o)
			var blocks []string
			for _, l := range r.Images[0].Layers {
				blocks = append(blocks, l.Block)
			}
			// The same diff ids give the same blocks, however they were packed.
			if want == nil {
				want = blocks
			} else if strings.Join(want, " ") != strings.Join(blocks, " ") {
				t.Errorf("blocks %v, want %v", blocks, want)
			}
			// And what was written can be pulled.
			run(t, skopeo, "--insecure-policy", "copy", o.Dest, "dir:"+t.TempDir())
		})
	}
	h, s := newHub(t), newServer(t)
	fails(t, s, h, options(s, "oci:"+tmp+"/layout", h.host+"/dest:thaw"), kind.Invalid, `"a"`, `"b"`)
	fails(t, s, h, options(s, "docker-archive:"+tmp+"/docker.tar:other:1", h.host+"/dest:thaw"), kind.NotFound, "example.com/team/app:d")
}

// TestUmociSource converts an image whose layers umoci packed.
func TestUmociSource(t *testing.T) {
	needRoot(t)
	umoci := need(t, "umoci")
	dir := filepath.Join(t.TempDir(), "image")
	run(t, umoci, "init", "--layout", dir)
	run(t, umoci, "new", "--image", dir+":v1")
	bundle := filepath.Join(t.TempDir(), "bundle")
	run(t, umoci, "unpack", "--image", dir+":v1", bundle)
	must(t, os.MkdirAll(bundle+"/rootfs/etc", 0o755))
	must(t, os.WriteFile(bundle+"/rootfs/etc/a", []byte("a"), 0o600))
	must(t, os.Symlink("a", bundle+"/rootfs/etc/link"))
	run(t, umoci, "repack", "--image", dir+":v1", bundle)
	must(t, os.Remove(bundle+"/rootfs/etc/a"))
	must(t, os.WriteFile(bundle+"/rootfs/etc/b", []byte("b"), 0o640))
	run(t, umoci, "repack", "--image", dir+":v1", "--refresh-bundle", bundle)
	for _, v := range variants {
		s := newServer(t)
		o := options(s, "oci:"+dir+":v1", "oci:"+t.TempDir()+"/out:x")
		o.Mode, o.Filesystem = v.mode, v.fs
		r := convert(t, o)
		layers := r.Images[0].Layers
		mounted(t, s.pool.path(layers[len(layers)-1].Block), v.mode, v.fs, len(layers), func(root string) {
			if _, err := os.Lstat(root + "/etc/a"); !os.IsNotExist(err) {
				t.Errorf("%v: a removed file is there: %v", v, err)
			}
			if b, err := os.ReadFile(root + "/etc/b"); string(b) != "b" {
				t.Errorf("%v: %q %v", v, b, err)
			}
			if to, err := os.Readlink(root + "/etc/link"); to != "a" {
				t.Errorf("%v: %q %v", v, to, err)
			}
		})
	}
}

// TestDockerSchema2 keeps docker's own media types, as docker-registry checks them.
func TestDockerSchema2(t *testing.T) {
	d := newDistribution(t, false)
	s := newServer(t)
	p := newPicture()
	p.image(runtime.GOARCH, smallLayers(1, 2))
	var m ocispec.Manifest
	must(t, json.Unmarshal(p.blobs[p.root.Digest], &m))
	delete(p.blobs, p.root.Digest)
	delete(p.manifests, p.root.Digest)
	m.MediaType, m.Config.MediaType, m.Annotations = dockerManifest, dockerConfig, nil
	for i := range m.Layers {
		m.Layers[i].MediaType, m.Layers[i].Annotations = dockerLayer+".gzip", nil
	}
	p.manifest(dockerManifest, m)
	source := pushTo(t, d.client, d.base, p, "source", "1")
	r := convert(t, options(s, source, d.host+"/dest:thaw"))
	raw, header, err := fetch(d.client, d.base, "dest", r.Digest, false)
	must(t, err)
	var got ocispec.Manifest
	must(t, json.Unmarshal(raw, &got))
	if header.Get("Content-Type") != dockerManifest || got.MediaType != dockerManifest || got.Layers[1].MediaType != dockerLayer+".gzip" || len(got.Layers[1].Annotations) == 0 {
		t.Errorf("converted manifest %s", raw)
	}
}

// BenchmarkConvert converts 300 MB of files, gzip, from a layout on this machine to
// another one.
func BenchmarkConvert(b *testing.B) {
	needRoot(b)
	p := newPicture()
	p.image(runtime.GOARCH, benchLayers())
	source := "oci:" + p.layout(b, "x")
	for _, v := range variants {
		b.Run(string(v.mode)+"/"+string(v.fs), func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				s := newServer(b)
				o := options(s, source, "oci:"+b.TempDir()+"/out:x")
				o.Mode, o.Filesystem, o.VirtualSizeBytes = v.mode, v.fs, 100<<30
				b.StartTimer()
				r, err := Convert(b.Context(), o)
				if err != nil {
					b.Fatal(err)
				}
				n := int64(0)
				for _, l := range r.Images[0].Layers {
					n += l.AppliedBytes
				}
				b.SetBytes(n)
			}
		})
	}
}

// benchLayers are two layers of small and large files that compress as programs do.
func benchLayers() []testLayer {
	var out []testLayer
	for n, count := range []int{6000, 1500} {
		b := torture.NewBuilder()
		for i := range count {
			data := torture.Data(int64(i), 10_000+i%9*5000)
			data = append(data, bytes.Repeat(data[:1000], 10+i%5*3)...)
			b.File(fmt.Sprintf("l%d/d%d/f%d", n, i%100, i), data)
		}
		b.File(fmt.Sprintf("l%d/large", n), torture.Data(int64(n), 20<<20))
		out = append(out, testLayer{b.Tar(), "gzip"})
	}
	return out
}
