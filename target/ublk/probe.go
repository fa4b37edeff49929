package ublk

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/uring"
)

// modprobeWait bounds loading the module, which takes milliseconds.
const modprobeWait = 5 * time.Second

// Probe says why ublk cannot be used on this machine, with what to do about it, or
// nil. It changes nothing but that it loads the kernel module. Errors are
// kind.Unsupported or kind.Denied.
func Probe() error {
	_, err := probe()
	return err
}

// known has the features of the kernel once a probe has succeeded: they do not change.
var known atomic.Uint64

// probe returns the features of the kernel.
func probe() (features uint64, err error) {
	if features := known.Load(); features != 0 {
		return features, nil
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		if why := denied(unix.ByteSliceToString(u.Release[:])); why != "" {
			return 0, kind.Errorf(kind.Unsupported, "ublk: %s", why)
		}
	}
	if _, err := os.Lstat(controlPath); errors.Is(err, os.ErrNotExist) {
		ctx, cancel := context.WithTimeout(context.Background(), modprobeWait)
		exec.CommandContext(ctx, "modprobe", "-q", "ublk_drv").Run() // openControl says what is missing
		cancel()
	}
	err = withControl(func(c *control) error {
		features, err = c.features()
		if err != nil {
			return kind.Errorf(kind.Unsupported, "ublk: this kernel cannot tell its features (%w): that needs Linux 6.5", err)
		}
		return lacks(features)
	})
	if err != nil {
		return 0, err
	}
	// The rings of queues are of another sort than the control ring.
	ring, err := uring.New(uring.Options{Entries: 2, OneThread: true})
	if err != nil {
		return 0, err
	}
	ring.Close()
	known.Store(features)
	return features, nil
}

// needed is what a server cannot do without.
const needed = featUserRecovery | featUserRecoveryReissue | featIoctlEncode

func lacks(features uint64) error {
	var missing []string
	for _, f := range []uint64{featIoctlEncode, featUserRecovery, featUserRecoveryReissue} {
		if features&f == 0 {
			missing = append(missing, featureNames[f])
		}
	}
	if len(missing) > 0 {
		return kind.Errorf(kind.Unsupported, "ublk: this kernel lacks %s", strings.Join(missing, ", "))
	}
	return nil
}

var release = regexp.MustCompile(`^(\d+)\.(\d+)(?:\.(\d+))?(.*)$`)

// distributionBuild is how builds of a distribution go on after 6.17.0: an ABI number
// and a flavour, as in -1015-azure or -8-generic.
var distributionBuild = regexp.MustCompile(`^-\d+-[a-z]`)

// denied says why ublk must not be touched on a kernel, or "".
//
// The change "ublk: implement NUMA-aware memory allocation" (529d4d632788) without
// "ublk: reorder tag_set initialization before queue allocation" (011af85ccd87) follows
// a nil pointer in ADD_DEV: the kernel oopses or panics. Stable 6.18.4 and 6.18.5 have
// the one without the other, and so have builds of Ubuntu's 6.17. No feature bit tells.
func denied(kernel string) string {
	m := release.FindStringSubmatch(kernel)
	if m == nil {
		return ""
	}
	major, _ := strconv.Atoi(m[1])
	minor, _ := strconv.Atoi(m[2])
	patch, _ := strconv.Atoi(m[3])
	switch {
	case major == 6 && minor == 18 && (patch == 4 || patch == 5),
		major == 6 && minor == 17 && patch == 0 && distributionBuild.MatchString(m[4]):
		return "Linux " + kernel + " crashes when a ublk device is added: use another kernel or another presentation"
	}
	return ""
}
