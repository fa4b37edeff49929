package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
)

// fioJob runs one fio job on a file that exists and returns operations and MiB per
// second. The page cache is left as it is; the caller decides what is in it.
func (b *bench) fioJob(ctx context.Context, file string, args ...string) (iops, mibs float64, err error) {
	command := b.lab.Command(ctx, "fio", append([]string{
		"--name=bench", "--filename=" + file, "--output-format=json", "--ioengine=psync", "--thread",
		"--allow_file_create=0", "--invalidate=0", "--randseed=1",
	}, args...)...)
	out, err := command.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, exit.Stderr)
		}
		return 0, 0, fmt.Errorf("fio %s on %s: %w", strings.Join(args, " "), file, err)
	}
	type side struct {
		IOPS float64 `json:"iops"`
		BW   float64 `json:"bw_bytes"`
	}
	var report struct {
		Jobs []struct {
			Error       int
			Read, Write side
		}
	}
	// fio may print a line of text before its report.
	if i := strings.IndexByte(string(out), '{'); i > 0 {
		out = out[i:]
	}
	if err := json.Unmarshal(out, &report); err != nil {
		return 0, 0, fmt.Errorf("report of fio: %w", err)
	}
	if len(report.Jobs) != 1 || report.Jobs[0].Error != 0 {
		return 0, 0, fmt.Errorf("fio %s on %s failed: %.500s", strings.Join(args, " "), file, out)
	}
	s := report.Jobs[0].Read
	if s.IOPS == 0 {
		s = report.Jobs[0].Write
	}
	return s.IOPS, s.BW / (1 << 20), nil
}
