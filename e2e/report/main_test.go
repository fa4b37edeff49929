package main

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

const stream = `{"Action":"run","Package":"github.com/thaw-project/thaw/a","Test":"TestGood"}
{"Action":"output","Package":"github.com/thaw-project/thaw/a","Test":"TestGood","Output":"quiet\n"}
{"Action":"pass","Package":"github.com/thaw-project/thaw/a","Test":"TestGood","Elapsed":0.1}
{"Action":"output","Package":"github.com/thaw-project/thaw/a","Test":"TestSkip","Output":"    x_test.go:9: needs root: run as root\n"}
{"Action":"skip","Package":"github.com/thaw-project/thaw/a","Test":"TestSkip"}
`

func TestReport(t *testing.T) {
	var out bytes.Buffer
	r := &report{out: &out, lines: map[string][]string{}}
	r.read(strings.NewReader(stream + `{"Action":"pass","Package":"github.com/thaw-project/thaw/a","Elapsed":1}`))
	if !r.summary(time.Second) {
		t.Error("a run without failure is reported as failed")
	}
	for _, want := range []string{"a TestSkip: needs root: run as root", "1 passed, 0 failed, 1 skipped", "ok       1.0s  a"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	if strings.Contains(out.String(), "quiet") {
		t.Error("output of a passed test is shown")
	}

	out.Reset()
	r.read(strings.NewReader(`{"Action":"output","Package":"h","Test":"TestHangs","Output":"waiting\n"}
{"Action":"fail","Package":"h","Elapsed":1}`))
	if r.summary(time.Second) || !strings.Contains(out.String(), "did not end: h TestHangs\nwaiting\n") {
		t.Errorf("a test that never ended is not reported in\n%s", out.String())
	}

	out.Reset()
	r = &report{out: &out, lines: map[string][]string{}}
	r.read(strings.NewReader(`{"Action":"output","Package":"p","Test":"TestBad","Output":"why\n"}
{"Action":"fail","Package":"p","Test":"TestBad","Elapsed":1}
{"Action":"build-output","ImportPath":"q","Output":"q/x.go:1:1: syntax error\n"}
{"Action":"build-fail","ImportPath":"q"}`))
	if r.summary(time.Second) {
		t.Error("a run with failures is reported as passed")
	}
	for _, want := range []string{"why", "p TestBad", "build of q", "syntax error", "2 failed"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
}
