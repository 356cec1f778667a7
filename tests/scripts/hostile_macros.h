// Macros of other headers, which may stand before wschat.hpp. check_header.py takes one "// ----" part at a time.

// ---- before the standard headers, too
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
#define ERROR 0
#define DELETE (0x00010000L)
#define OK 0
#define True 1
#define False 0
#define Bool int
#define None 0L

// ---- Windows
#define min(a, b) (((a) < (b)) ? (a) : (b))
#define max(a, b) (((a) > (b)) ? (a) : (b))
#define small char
#define hyper long long
#define near
#define far
#define pascal
#define cdecl
#define interface struct
#define IN
#define OUT
#define OPTIONAL
#define CONST const
#define VOID void
#define TRUE 1
#define FALSE 0
#define ERROR 0
#define NO_ERROR 0
#define DELETE (0x00010000L)
#define STRICT 1
#define THIS void
#define PURE = 0
#define DOMAIN 1
#define OVERFLOW 3
#define UNDERFLOW 4
#define IGNORE 0
#define GetMessage GetMessageW
#define SendMessage SendMessageW
#define PostMessage PostMessageW
#define CreateWindow CreateWindowW
#define CreateEvent CreateEventW
#define CreateFile CreateFileW
#define DeleteFile DeleteFileW
#define GetObject GetObjectW
#define LoadString LoadStringW
#define DrawText DrawTextW
#define ReportEvent ReportEventW
#define GetCurrentTime() 0
#define Yield()

// ---- X11
#define None 0L
#define Bool int
#define Status int
#define Success 0
#define Always 2
#define True 1
#define False 0
#define CursorShape 0
#define KeyPress 2
#define KeyRelease 3
#define FocusIn 9
#define FocusOut 10
#define Expose 12
#define FontChange 255
#define Unsorted 0
#define Complex 0
#define Nonconvex 1
#define Convex 2
#define Above 0
#define Below 1
#define GrayScale 1

// ---- Qt
#define slots
#define signals public
#define emit
#define foreach(variable, container) for (variable : container)
#define forever for (;;)
#define Q_OBJECT
#define Q_SIGNALS public
#define Q_SLOTS
#define Q_EMIT
#define Q_FOREACH(variable, container) for (variable : container)
#define Q_FOREVER for (;;)
#define Q_UNUSED(x) (void)x;

// ---- Apple
#define check(assertion) do {} while (0)
#define verify(assertion) do {} while (0)
#define require(assertion, label) do {} while (0)
#define check_noerr(error) do {} while (0)
#define verify_noerr(error) do {} while (0)
#define nil nullptr
#define Nil nullptr
#define YES ((signed char)1)
#define NO ((signed char)0)

// ---- Arduino
#define F(literal) (literal)
#define B0 0
#define B1 1
#define B11 3
#define bit(b) (1UL << (b))
#define _BV(b) (1 << (b))
#define abs(x) ((x) > 0 ? (x) : -(x))
#define round(x) ((x) >= 0 ? (long)((x) + 0.5) : (long)((x)-0.5))
#define sq(x) ((x) * (x))
#define word(x) (x)
#define radians(degrees) (degrees)
#define degrees(radians) (radians)
#define constrain(x, low, high) (x)
#define lowByte(w) (w)
#define highByte(w) (w)
#define bitRead(value, bit) (value)
#define interrupts()
#define HIGH 0x1
#define LOW 0x0
#define INPUT 0x0
#define OUTPUT 0x1
#define SERIAL 0x0
#define DISPLAY 0x1
#define DEFAULT 1
#define PI 3.14

// ---- Unix
#define unix 1
#define linux 1
#define major(device) (device)
#define minor(device) (device)
#define OK 0
#define ERR (-1)
